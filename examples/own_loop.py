"""An adapter in a training loop of your own, with PEFT's names: four steps on one sentence.

python examples/own_loop.py
"""

from __future__ import annotations

import torch

from decal import LoraConfig, PeftModel, TaskType, get_peft_model, load_model, load_tokenizer
from decal.bundled import MODEL_DIR

tokenizer = load_tokenizer(MODEL_DIR)
model = load_model(MODEL_DIR)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
model = get_peft_model(model, config)
model.print_trainable_parameters()

ids = tokenizer("The harbour lay quiet in the morning light.", return_tensors="pt")["input_ids"]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
for step in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

model.save_pretrained("runs/own_loop")
again = PeftModel.from_pretrained(load_model(MODEL_DIR), "runs/own_loop")
print("the same adapter, read back:", torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits))
