"""Lab, step 3: train the adapter with TRL's SFTTrainer, on the answers alone.

TRL's own names are `max_length` and `warmup_steps` (below 1: a share of all steps). Rows of prompt and completion get
the chat template and a mask from it: only the answers are learnt.
"""

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from decal import LoraConfig, TaskType, get_peft_model

on_gpu = torch.cuda.is_available()
dtype = torch.bfloat16 if on_gpu else torch.float32  # most CPUs are slow in 16 bits
tokenizer = AutoTokenizer.from_pretrained("./smollm2")
base_model = AutoModelForCausalLM.from_pretrained("./smollm2", dtype=dtype, device_map="auto")
lora_config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    task_type=TaskType.CAUSAL_LM,
    lora_dropout=0.05,
    bias="none",
)
model = get_peft_model(base_model, lora_config)

dataset = load_dataset("json", data_files="./no_robots.jsonl", split="train")
dataset = dataset.shuffle(seed=42).select(range(16))


def split(example: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    return {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]}


formatted = dataset.map(split, remove_columns=["messages"])

training_args = SFTConfig(
    output_dir="./lora-smollm2-r16",
    num_train_epochs=3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=2e-4,
    logging_steps=10,
    max_length=512,
    bf16=on_gpu,
    use_cpu=not on_gpu,
    warmup_steps=0.1,
    save_strategy="epoch",
    report_to="none",
)
trainer = SFTTrainer(model=model, args=training_args, train_dataset=formatted, processing_class=tokenizer)
result = trainer.train()
print(f"training loss: {result.training_loss:.4f}")
