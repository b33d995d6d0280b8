"""Lab, step 2: what each rank costs. The number of trainable parameters grows in proportion to the rank."""

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from decal import LoraConfig, TaskType, get_peft_model

results = []
for r in [4, 8, 16, 32, 64]:
    base = AutoModelForCausalLM.from_pretrained("./smollm2", dtype=torch.float16, device_map="auto")
    config = LoraConfig(
        r=r,
        lora_alpha=r * 2,
        target_modules=["q_proj", "v_proj"],
        task_type=TaskType.CAUSAL_LM,
        lora_dropout=0.05,
        bias="none",
    )
    pm = get_peft_model(base, config)
    trainable = sum(p.numel() for p in pm.parameters() if p.requires_grad)
    total = sum(p.numel() for p in pm.parameters())
    results.append({"rank": r, "trainable": trainable, "total": total, "pct": f"{trainable / total * 100:.4f}%"})
    del pm, base
    torch.cuda.empty_cache()

df = pd.DataFrame(results)
print(df.to_string(index=False))
