"""What is aimed at, by GPU and the names of measured rows. A GPU without aims has the model and the floor instead."""

LORA_16 = "16-bit LoRA"  # the peer of a QLoRA layer
# Ours over the frozen layer, and microseconds.
AIMS: dict[str, dict[str, float]] = {
    "NVIDIA H100 80GB HBM3": {
        "bf16 M=8192 4096->4096 r=16": 1.08, "bf16 M=8192 4096->14336 r=16": 1.04, "bf16 M=8192 14336->4096 r=16": 1.05,
        "forward 16x4096->14336": 15,
    },
}  # fmt: skip
