"""Adapters of other PEFT methods that are LoRA adapters once their matrices are multiplied out."""
