"""Lab, step 5: the base and the merged model side by side, on the same prompts and with the same random numbers."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # most CPUs are slow in 16 bits
tokenizer = AutoTokenizer.from_pretrained("./smollm2")
base_model = AutoModelForCausalLM.from_pretrained("./smollm2", dtype=dtype, device_map="auto")
merged_model = AutoModelForCausalLM.from_pretrained("./smollm2-merged", dtype=dtype, device_map="auto")

test_prompts = [
    "Explain photosynthesis to a 10-year-old.",
    "Write a short email declining a meeting politely.",
    "List 3 advantages of renewable energy.",
]
responses = []
for prompt in test_prompts:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt").to(merged_model.device)
    for name, model in (("base", base_model), ("merged", merged_model)):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = model.generate(**inputs, max_new_tokens=40, temperature=0.7, do_sample=True)
        response = tokenizer.decode(outputs[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        responses.append((name, prompt, response))
        print(f"{name}: {prompt}\n{response[:300]}\n{'-' * 50}")
