"""The end of `make gpu`: host time, bytes kept for backward, and the peers that compile for themselves."""

import torch

from common import tree
from common.timing import Race
from gpu.stage import Stage
from peers.lora import build
from peers.rows import DROPOUTS, OP, case_result, cases, host_peers, kept_result, new_results

WITHOUT = dict.fromkeys(("eager", "PEFT"), "measured with the headline")


def run(stage: Stage) -> dict:
    device, tiny = stage.device, stage.tiny
    roof = stage.rows().get(("roof", "roof"))
    data = new_results(device, tiny, None if device == "cpu" else roof)  # a dry run's was measured for other dtypes
    name, errors = f"{OP}_{device}" + ("_tiny" if tiny else ""), data["left_out"]
    data["kept"] = kept_result(device, tiny)
    kept = {peer: row["per_element_of_x"] for peer, row in data["kept"].items() if isinstance(row, dict)}
    stage.row("kept", "q/k/v", per_element_of_x=kept)
    stage.say("kept for backward, bytes per element of x: " + ", ".join(f"{n} {v:.2f}" for n, v in kept.items()))
    sides, absent = host_peers(device)
    raced = Race(sides, "cpu", calls=5 if tiny else 200).run(min(8.0, stage.left() / 4))
    data["host"] = {"peers": raced.summary("nn.Linear fwd"), "absent": absent}
    host = {peer: row["median_s"] for peer, row in data["host"]["peers"].items()}
    stage.row("host", "tiny call", seconds=host)
    stage.say("host us: " + ", ".join(f"{n} {1e6 * s:.0f}" for n, s in host.items()))
    tree.save_json(name, data)
    for case in cases(device, tiny):
        if stage.left() < 8:
            errors.append(f"{case.name}: out of time")
            continue
        try:
            peers, absent = build(case, device, DROPOUTS, WITHOUT)
            absent = {each: why for each, why in absent.items() if each not in WITHOUT}
            raced = Race({each: peer.step for each, peer in peers.items()}, device)
            raced.run(min(6.0, max(0.1, stage.left() / 3)), max_rounds=1 if tiny else 25, min_rounds=1 if tiny else 5)
        except Exception as error:  # one case that fails does not cost the others
            errors.append(f"{case.name}: {type(error).__name__}: {str(error)[:160]}")
            continue
        row = case_result(case, raced, peers, absent, data["roof"], device)
        data["cases"].append(row)
        tree.save_json(name, data)
        ratios = {each: peer["ratio"] for each, peer in row["peers"].items()}
        stage.row("peers", case.name, ratios=ratios, absent=absent)
        stage.say(f"{case.name}, over frozen: " + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items() if n != "frozen"))
        del peers, raced
        if device == "cuda":
            torch.cuda.empty_cache()
    tree.save_json(name, data)
    return {"ok": not errors, "errors": errors}
