"""What the paper claims, in our words, each with where it is known from; docs/paper.md has more."""

from typing import NamedTuple


class Claim(NamedTuple):
    """One of a report's sections."""

    title: str
    text: str


CLAIMS = {
    "sizes": Claim(
        "Four networks of equal active parameters",
        "Experts add parameters and not FLOPs: a BlackMamba costs a token what a dense model of "
        "its active parameters costs (figure 1; the FLOP formulas, from the authors' code).",
    ),
    "ladder": Claim(
        "Loss against training FLOPs",
        "At equal training FLOPs and equal active parameters BlackMamba is below dense transformer "
        "and dense Mamba (from the abstract and notes on the paper).",
    ),
    "latency": Claim(
        "Generation latency",
        "Generation in linear time and constant memory, faster than the three others, by more the "
        "longer the context (figure 5, known from notes on the paper; no factor is stated).",
    ),
    "experts": Claim(
        "What the experts do",
        "Most layers use their experts evenly, the last ones less so (known from notes on the "
        "paper, which leave open by which rule of routing the tokens were counted).",
    ),
    "sinkhorn": Claim(
        "Sinkhorn's iteration",
        "A better start brings 10 to 20 iterations down to about one (the paper's appendix, known "
        "from notes on it; start and stopping test from the authors' code).",
    ),
    "ablations": Claim(
        "One change at a time",
        "Sequential layers and eight Sinkhorn-routed experts were chosen over parallel layers and "
        "other numbers of experts (the authors' code has the variants; their numbers are not known "
        "to us).",
    ),
    "better": Claim(
        "A better recipe",
        "Not the paper's: half of each expert shared by all tokens and the other half one of four "
        "times as many, a softmax router with a balance loss in place of Sinkhorn, Muon, and a "
        "learning rate that falls to 0, at the same active parameters (docs/paper.md cites the "
        "evidence).",
    ),
    "not-here": Claim(
        "What cannot be made here",
        "Zero-shot scores of the 340M/1.5B and 630M/2.8B models after 300 billion tokens, against "
        "Pythia, OPT and a dense Mamba (known from notes on the paper).",
    ),
}
"""By the section's key."""
