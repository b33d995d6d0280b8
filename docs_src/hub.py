"""An adapter from the hub, what its configuration says, and the way back up."""

import torch

from decal import AutoPeftModelForCausalLM, PeftConfig

model = AutoPeftModelForCausalLM.from_pretrained(
    "username/my-lora-adapter", device_map="auto", torch_dtype=torch.bfloat16
)

config = PeftConfig.from_pretrained("username/my-lora-adapter")
print(f"base model: {config.base_model_name_or_path}")
print(f"rank {config.r}, alpha {config.lora_alpha}")
print(f"target modules: {config.target_modules}")

model.push_to_hub("username/my-lora-adapter")  # the adapter alone: two small files
