"""`python -m moe_kernels`: what is built, and which implementation each operator uses here."""

from moe_kernels import build_info


def main() -> None:
    info = build_info()
    operators = info.pop("operators")
    for key, value in info.items():
        print(f"{key:18} {value}")
    print(f"\n{'operator':28} {'cpu':12} {'cuda':12} reference")
    for op, by_device in operators.items():
        print(f"{op:28} {by_device['cpu']:12} {by_device['cuda']:12} {by_device['reference']}")


if __name__ == "__main__":
    main()
