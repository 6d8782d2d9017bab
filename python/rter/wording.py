"""The words of a report: what its columns mean, its verdict, what is proved."""

from typing import Any

COLUMNS = {
    "SA": "accuracy on clean images",
    "RA": "accuracy under PGD on the whole model",
    "AA": "accuracy under AutoAttack's standard ensemble (full suite)",
    "verdict": "fraction of the images that withstand every attack of the suite",
    "RA-E": "accuracy of a single expert under PGD on it: mean, minimum and maximum over the experts",
    "RA-R": "accuracy under PGD on the router's choice",
    "load": "smallest fraction of the clean images that an expert gets",
    "train s": "seconds of training, without the measurements on held-out images",
}


def summary(report: dict[str, Any]) -> dict[str, float | None]:
    """The figures of one run that tables show."""
    return {
        "SA": report["sa"],
        "RA": report["ra"],
        "AA": report["aa"],
        "verdict": report["verdict"],
        "RA-E mean": sum(report["ra_e"]) / len(report["ra_e"]) if report["ra_e"] else None,
        "RA-E min": min(report["ra_e"], default=None),
        "RA-E max": max(report["ra_e"], default=None),
        "RA-R": report["ra_r"],
        "min load": min(report["expert_load"], default=None),
        "train s": report["train_seconds"],
    }


def verdict(report: dict[str, Any]) -> str:
    """The result of an evaluation in one line."""
    low, high = report["intervals"]["verdict"]
    worst = report["worst_attack"]
    collapsed = report.get("collapsed")  # reports from before it was watched, and those of other models, have none
    failed = [name for name, check in report["checks"].items() if not check["passed"]]
    return (
        f"Verdict: {report['verdict']:.1%} of the images withstand every attack of the {report['suite']} suite "
        f"(95 % interval {low:.1%} to {high:.1%}); PGD alone leaves {report['ra']:.1%}"
        + (f", AutoAttack alone {report['aa']:.1%}" if report["aa"] is not None else "")
        + (f". Of what PGD leaves, {worst} breaks the most. " if worst != "pgd" else ". ")
        + (f"Checks that failed: {'; '.join(failed)}." if failed else "All checks passed.")
        + (f" Training collapsed in epoch {collapsed}: catastrophic overfitting." if collapsed else "")
    )


def counted(number: int, what: str) -> str:
    """1 expert, 2 experts, no experts."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def distance(eps: float) -> str:
    """A radius: 0.2, or 8/255 for a small one that three digits do not give exactly."""
    if eps < 0.25 and eps != float(f"{eps:.3g}") and eps == round(eps * 255) / 255:
        return f"{round(eps * 255)}/255"
    return f"{eps:.4g}"


def measured_on(report: dict[str, Any]) -> str:
    """Which images the figures were measured on."""
    sample = report.get("sample")  # reports from before there were samples have none
    if not sample:
        return f"{report['held_out']} {report['split']} images"
    return (
        f"{report['held_out']} of the {sample['of']} {report['split']} images (drawn by seed {sample['seed']} in the "
        "proportions of the classes)"
    )


def weights_of(report: dict[str, Any]) -> str:
    """Which weights of a run they are, and that they were rounded, if they were."""
    if report["weights"] not in ("last", "best"):
        return ""
    dtype = report.get("weights_dtype", "float32")  # reports from before weights could be rounded have none
    return f" with the {report['weights']} weights" + ("" if dtype == "float32" else f", stored in {dtype}")


def certificate(report: dict[str, Any]) -> str:
    """What is proved, in at most two sentences; report.json has the constants."""
    parts, radius = [], f"within {report['norm']} distance {distance(report['eps'])}"
    if report["route_radius"]:
        parts.append(
            f"For {report['route_radius']['certified']:.1%} of the images it is proved that no perturbation {radius} "
            "sends them to another expert; this says nothing about the class that their expert then predicts."
        )
    if report["certificate"]:
        reach = report["certificate"]["greatest_radius"]
        proves = "nothing" if reach < report["eps"] else "the class of some images"
        parts.append(
            f"The RT-ER paper's certificate (theorem 5.4) reaches at most {reach:.2g}, so it proves {proves} {radius}."
        )
    return " ".join(parts)
