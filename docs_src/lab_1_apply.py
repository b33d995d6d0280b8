"""Lab, step 1: load a small model and put a LoRA adapter on it."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal import LoraConfig, TaskType, get_peft_model

model_name = "./smollm2"
tokenizer = AutoTokenizer.from_pretrained(model_name)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
base_model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float16, device_map="auto")

lora_config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    task_type=TaskType.CAUSAL_LM,
    lora_dropout=0.05,
    bias="none",
)
model = get_peft_model(base_model, lora_config)
model.print_trainable_parameters()
