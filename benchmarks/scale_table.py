"""The table of docs/scale.md: memory and time of full training with the gate, by the formula of agcl.forecast.

python benchmarks/scale_table.py
"""

from agcl.forecast import MACHINES, ModelSize, Settings, Work, forecast

# Shapes of Llama 3.2 1B (tied embeddings), Llama 3.1 8B and 70B: layers, width, inner width, vocabulary, weights.
MODELS = {
    "1B": (16, 2048, 8192, 128_256, 1_235_814_400),
    "8B": (32, 4096, 14_336, 128_256, 8_030_261_248),
    "70B": (80, 8192, 28_672, 128_256, 70_553_706_496),
}
DEVICES = (1, 8, 64)
# Eight tasks of 5000 rows, 3 epochs; 128 rows of 512 tokens in a step, all devices together.
NUM_TASKS, STEPS, ROWS = 8, 8 * 3 * 5000 // 128, 128
HEADER = ("model", "GPUs", "kept", "largest at once", "fits 80 GB", "training", "gate", "attribution", "normalising")


def sizes(name):
    layers, width, inner, vocabulary, weights = MODELS[name]
    return ModelSize(weights, weights, weights, vocabulary * width, layers, width, inner, vocabulary)


def row(name, devices, machine):
    settings = Settings("bf16-mixed", "fsdp", devices, gradient_checkpointing=True)
    rows = min(ROWS // devices, 4)
    work = Work(
        NUM_TASKS,
        STEPS,
        micro_batches=ROWS // devices // rows,
        rows=rows,
        tokens=512,
        answer_tokens=32,
        samples=128,
        attributed_rows=1,
    )
    found = forecast(sizes(name), settings, work, machine)
    fits = "yes" if found.peak_bytes <= machine.memory else "no"
    times = [duration(seconds) for seconds in found.seconds.values()]
    return (name, str(devices), gigabytes(sum(found.kept.values())), gigabytes(found.peak_bytes), fits, *times)


def duration(seconds):
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def gigabytes(count):
    return f"{count / 1e9:.1f} GB"


def table(machine):
    lines = [HEADER, ("---", "---:", "---:", "---:", "---", *["---:"] * 4)]
    lines += [row(name, devices, machine) for name in MODELS for devices in DEVICES]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table(MACHINES["h100"]))
