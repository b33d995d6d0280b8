"""The whole lab in one script: apply, compare ranks, train, save and merge, answer."""

import pandas as pd
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from decal import LoraConfig, PeftModel, TaskType, get_peft_model

on_gpu = torch.cuda.is_available()
dtype = torch.bfloat16 if on_gpu else torch.float32  # most CPUs are slow in 16 bits
model_name = "./smollm2"
tokenizer = AutoTokenizer.from_pretrained(model_name)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def lora(r: int) -> LoraConfig:
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=["q_proj", "v_proj"],
        task_type=TaskType.CAUSAL_LM,
        lora_dropout=0.05,
        bias="none",
    )


# 1. Compare ranks.
rows = []
for r in [4, 8, 16, 32, 64]:
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, device_map="auto")
    pm = get_peft_model(base, lora(r))
    trainable, total = pm.get_nb_trainable_parameters()
    rows.append({"rank": r, "trainable": trainable, "total": total, "pct": f"{trainable / total * 100:.4f}%"})
    del pm, base
print(pd.DataFrame(rows).to_string(index=False))

# 2. Put the adapter on. This stands after the comparison, and the pad token has no say in it.
base_model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, device_map="auto")
model = get_peft_model(base_model, lora(16))
model.print_trainable_parameters()

# 3. Train once, on the answers alone.
dataset = load_dataset("json", data_files="./no_robots.jsonl", split="train").shuffle(seed=42).select(range(16))
dataset = dataset.map(
    lambda example: {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]},
    remove_columns=["messages"],
)
args = SFTConfig(
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
trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
result = trainer.train()

# 4. Save, and merge into a fresh copy of the base.
model.save_pretrained("./lora-adapter-r16")
base_fresh = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, device_map="auto")
merged = PeftModel.from_pretrained(base_fresh, "./lora-adapter-r16").merge_and_unload()

# 5. Answer.
answers = []
for prompt in ["Explain photosynthesis to a 10-year-old.", "List 3 advantages of renewable energy."]:
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt").to(merged.device)
    with torch.no_grad():
        outputs = merged.generate(**inputs, max_new_tokens=40, temperature=0.7, do_sample=True)
    answers.append(tokenizer.decode(outputs[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"Q: {prompt}\nA: {answers[-1][:300]}\n")
