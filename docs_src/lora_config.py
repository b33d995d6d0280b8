"""Three adapters for one model: every linear layer with rank-stabilised scale, attention alone, attention and MLP."""

from transformers import AutoModelForCausalLM

from decal import LoraConfig, TaskType, get_peft_model

base_model = AutoModelForCausalLM.from_pretrained("./smollm2")

# Rank-stabilised: the scale is lora_alpha / sqrt(r) = 8 here, four times that of lora_alpha / r.
all_linear = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    target_modules="all-linear",
    bias="none",
    use_rslora=True,
)
attention = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    bias="none",
)
attention_and_mlp = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    r=16,
    lora_alpha=32,
    lora_dropout=0.05,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    bias="none",
)

model = get_peft_model(base_model, all_linear)
model.print_trainable_parameters()

model = get_peft_model(model.unload(), attention)
model.print_trainable_parameters()

model = get_peft_model(model.unload(), attention_and_mlp)
model.print_trainable_parameters()
