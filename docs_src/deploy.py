"""Three ways to put adapters to use: switch between them, merge one, merge one that was trained on a 4-bit base."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal import AutoPeftModelForCausalLM, PeftModel

# A: one base, several adapters; switching is one assignment.
base_model = AutoModelForCausalLM.from_pretrained("./llama3", torch_dtype=torch.bfloat16, device_map="auto")
model = PeftModel.from_pretrained(base_model, "./lora-medical")
model.load_adapter("./lora-legal", adapter_name="legal")
model.set_adapter("legal")

# B: the adapter and the base that it names, merged and saved as an ordinary model.
medical = AutoPeftModelForCausalLM.from_pretrained("./lora-medical", torch_dtype=torch.bfloat16, device_map="auto")
merged_model = medical.merge_and_unload()
merged_model.save_pretrained("./llama3-medical-merged")
tokenizer = AutoTokenizer.from_pretrained("./llama3")
tokenizer.save_pretrained("./llama3-medical-merged")

# C: an adapter that was trained on a 4-bit base goes onto the 16-bit one. What it learnt to correct were the 4-bit
# weights, so the merged model is close to what was trained, not equal to it.
qlora = AutoPeftModelForCausalLM.from_pretrained(
    "./qlora-output", torch_dtype=torch.float16, device_map="auto", low_cpu_mem_usage=True
)
merged = qlora.merge_and_unload()
merged.save_pretrained("./merged-model")
