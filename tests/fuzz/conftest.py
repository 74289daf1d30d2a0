"""How many inputs each target of the fuzzing tried."""


def pytest_terminal_summary(terminalreporter):
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, number in getattr(report, "user_properties", []):
                terminalreporter.write_line(f"{number:>9,} {name}: {report.nodeid}")
