"""decal: LoRA and QLoRA from plan to production."""

__version__ = "0.1.0"
