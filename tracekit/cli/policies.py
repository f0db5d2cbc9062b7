"""``tracekit policies``: every shipped policy, its parameters and where it comes from."""

from __future__ import annotations

from tracekit.cli import options, out


def policies(json: options.Json = False) -> None:
    """Every policy, its parameters and defaults, its search space and its source."""
    from tracekit.policy.rule import shipped

    found = [
        {
            "policy": rule.name,
            "parameters": rule.defaults,
            "space": dict(rule.space),
            "doc": rule.doc,
        }
        for rule in shipped()
    ]
    if json:
        out.print_json(found)
        return
    for policy in found:
        summary, _, rest = policy["doc"].partition("\n")
        print(f"{policy['policy']}: {summary}")
        for key, value in policy["parameters"].items():
            searched = policy["space"].get(key)
            text = str(value).lower() if isinstance(value, bool) else value
            print(f"    {key} = {text}" + (f"    (tuned over {searched})" if searched else ""))
        for line in rest.strip().splitlines():
            print(f"    {line}")
        print()
    print("Write one as name:key=value,key=value; a Python file of your own (./mine.py:key=value) works the same way.")
