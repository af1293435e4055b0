"""The summary of `make gpu`: what passed, what failed and why; each figure beside the model, the floor and the aim."""

from gpu.aims import AIMS, LORA_16

LINES = 40
FOURBIT_SHOWN = ("lora ", "dequantize 14336", "forward 16x4096")  # the other rows are in the files
Rows = dict[tuple[str, str], dict]


def fourbit_aims(cases: dict[str, dict[str, float]]) -> list[str]:
    """A line of QLoRA over LoRA on a 16-bit weight, forward and backward, beside what is aimed at."""
    ratios = []
    for case, peers in cases.items():
        ours = [us for name, us in peers.items() if name.startswith("ours")]
        if case.startswith("lora") and ours and LORA_16 in peers:
            aim = 1.05 if case.startswith("lora 8192x") else 1.10
            ratios.append(f"{case.removeprefix('lora ')} {min(ours) / peers[LORA_16]:.2f} (aim {aim:.2f})")
    return [f"QLoRA / 16-bit LoRA: {', '.join(ratios)}"] if ratios else []


def _stage_lines(name: str, row: dict) -> list[str]:
    """One line of a stage, and one for each of what failed."""
    said = [row["error"]] if "error" in row else []
    if name == "correctness":
        passed = [check["ok"] for check in row.get("checks", {}).values()]
        said.append(f"{sum(passed)} of {len(passed)} checks")
    if "jobs" in row:
        choices = list(row["strategies"].values())
        said.append(f"tiles: {row['jobs']}; fused in {choices.count('fused')} of {len(choices)} sizes")
        said.append(f"{len(row['fourbit_rows'])} limits of 4 bits")
    if "left_out" in row:
        said.append(f"left out: {row['left_out']}")
    lines = [f"{'PASS' if row['ok'] else 'FAIL'} {name} ({row['seconds']} s) {'; '.join(said)}".rstrip()]
    lines += [f"     {k}: {check['detail']}"[:160] for k, check in row.get("checks", {}).items() if not check["ok"]]
    return lines + [f"     {error}"[:160] for error in row.get("errors", ())[:3]]


def _beside(row: dict) -> str:
    """What a ratio is to be read with: the model's, the floor, and the aim where there is one."""
    return ", ".join(f"{what} {row[what]:.2f}" for what in ("model", "floor", "aim") if what in row)


def headline_lines(rows: Rows) -> list[str]:
    lines = []
    for (kind, name), row in rows.items():
        if kind != "headline":
            continue
        cells = []
        for peer, each in row["peers"].items():
            if peer != "frozen":
                beside = _beside(each)
                short = peer.removesuffix(f" p={row['p']:g}")
                cells.append(f"{short} {each['ratio']:.2f}" + (f" ({beside})" if beside else ""))
        lines.append(f"{name}, / frozen: {', '.join(cells)}"[:220])
    return lines


def summary(data: dict, rows: Rows) -> list[str]:
    """At most LINES lines; failures first."""
    env, stages = data["environment"], data["stages"]
    lines = [f"{env.get('gpu') or env['cpu']}, torch {env['torch']}, triton {env['triton']}, peft {env['peft']}, "
             f"commit {env['commit']}, {env['date']}"]  # fmt: skip
    if env.get("lacking"):
        lines.append(f"FAIL extension: NO CUDA KERNEL WAS TESTED OR TIMED, they require {env['lacking']}"[:200])
    for name, row in stages.items():
        lines += _stage_lines(name, row)
    lines += headline_lines(rows)
    if ("kept", "q/k/v") in rows:
        kept = rows["kept", "q/k/v"]["per_element_of_x"]
        lines.append("kept for backward, q/k/v, bytes per element of x: "
                     + ", ".join(f"{n} {v:.2f}" for n, v in kept.items()))  # fmt: skip
    if ("host", "tiny call") in rows:
        host = rows["host", "tiny call"]["seconds"]
        wanted = [n for n in ("nn.Linear", "PEFT p=0", "ours LoRALinear") if f"{n} fwd" in host]
        lines.append("host us, fwd · fwd+bwd: " + ", ".join(
            f"{n} {host[f'{n} fwd'] * 1e6:.0f} · {host[f'{n} fwd+bwd'] * 1e6:.0f}" for n in wanted))  # fmt: skip
    fourbit = {name: row["us"] for (kind, name), row in rows.items() if kind == "fourbit"}
    aims = AIMS.get(env.get("gpu", ""), {})
    for case, peers in fourbit.items():
        if case.startswith(FOURBIT_SHOWN):
            cells = ", ".join(f"{name} {us:.0f}" for name, us in peers.items())
            floor = rows["fourbit", case].get("floor_us")
            beside = [f"floor {floor:.0f}"] if floor else []
            beside += [f"aim {aims[case]}"] if case in aims else []
            lines.append(f"4-bit {case}, us: {cells} ({', '.join(beside)})")
    lines += fourbit_aims(fourbit)
    absent = {name: why for row in rows.values() for name, why in (row.get("absent") or {}).items()}
    reasons = sorted({f"{name.split(' p=')[0]}: {why}"[:100] for name, why in absent.items()})
    lines += [f"absent {'; '.join(reasons)}"[:300]] if reasons else []
    return lines[:LINES]
