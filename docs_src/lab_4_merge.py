"""Lab, step 4: save the adapter, look at its size, and merge it into a fresh copy of the base."""

import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal import LoraConfig, PeftModel, TaskType, get_peft_model

base_model = AutoModelForCausalLM.from_pretrained("./smollm2", dtype=torch.float16, device_map="auto")
lora_config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
model = get_peft_model(base_model, lora_config)  # the lab's has been trained by now

model.save_pretrained("./lora-adapter-r16")
adapter_size = sum(
    os.path.getsize(os.path.join("./lora-adapter-r16", name))
    for name in os.listdir("./lora-adapter-r16")
    if name.endswith((".safetensors", ".bin"))
)
print(f"adapter: {adapter_size / 1024:.1f} KiB")

base_fresh = AutoModelForCausalLM.from_pretrained("./smollm2", dtype=torch.float16, device_map="auto")
peft_model = PeftModel.from_pretrained(base_fresh, "./lora-adapter-r16")
merged_model = peft_model.merge_and_unload()
merged_model.save_pretrained("./smollm2-merged")
AutoTokenizer.from_pretrained("./smollm2").save_pretrained("./smollm2-merged")
