"""The peers' figures on one H100 80GB HBM3 and on two, bf16, and what ours come to beside them (>= 1 is
better)."""

from typing import Any

SOURCE = (
    "vLLM 0.26.0 and SGLang 0.5.17, measured for this project on one H100 80GB HBM3 on 2026-11-24: bf16,"
    " 128 in / 128 out, greedy, prefix cache off, random weights; multi-turn: SGLang's best arm, host tier"
    " with mixed steps of 1,024 tokens"
)
DECODE_TOK_S: dict[str, dict[str, dict[str, float]]] = {
    "llama8b": {
        "vllm": {"b1": 153, "b8": 1_186, "b64": 8_443, "b256": 21_891},
        "sglang": {"b1": 157, "b8": 1_214, "b64": 8_426, "b256": 21_960},
    },
    "smol135m": {
        "vllm": {"b1": 394, "b8": 2_373, "b64": 16_230, "b256": 29_607},
        "sglang": {"b1": 539, "b8": 3_982, "b64": 24_710, "b256": 66_472},
    },
}
MULTITURN: dict[str, float] = {
    "wall_s": 22.1,
    "chat_wall_s": 18.6,
    "ttft_mean_ms": 300,
    "ttft_p99_ms": 1_215,
    "ttft_turn5_ms": 414,
    "chat_tpot_mean_ms": 17.6,
    "steady_mean_ms": 14.6,
    "steady_p50_ms": 9.5,
    "steady_p99_ms": 46,
    "steady_max_ms": 89,
}


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return each figure over the best peer's: tokens/s as they are, times the other way round."""
    found = {}
    for model, decode in results.get("decode", {}).items():
        peers = DECODE_TOK_S.get(model, {})
        for batch, figures in decode.items():
            theirs = [peer[batch] for peer in peers.values() if batch in peer]
            if theirs:
                found[f"{model}_{batch}"] = round(figures["decode_tok_s"] / max(theirs), 3)
    figures = results.get("multiturn", {}).get("tier_on", {})
    if figures.get("shape") == "llama8b":
        for name, best in MULTITURN.items():
            found[f"multiturn_{name}"] = round(best / figures[name], 3)
    return found


TP_SOURCE = (
    "vLLM 0.26.0 on two H100 80GB HBM3, tensor parallel, measured for this project on 2026-11-24: bf16, 8B"
    " shape, 128 in / 128 out, greedy, prefix cache off, random weights"
)
TP_DECODE_TOK_S: dict[str, dict[str, dict[str, float]]] = {
    "llama8b": {"tp2": {"b1": 242, "b8": 1_819, "b64": 11_752, "b256": 31_353}}
}


def tp_ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return tokens/s over the peer's on as many cards."""
    return {
        f"{model}_{ranks}_{batch}": round(figures[batch]["decode_tok_s"] / theirs, 3)
        for model, by_ranks in results.get("decode", {}).items()
        for ranks, figures in by_ranks.items()
        for batch, theirs in TP_DECODE_TOK_S.get(model, {}).get(ranks, {}).items()
        if batch in figures
    }
