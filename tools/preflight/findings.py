"""All findings of preflight on a machine and a planned run."""

from tools.preflight import checks, flags, sdk
from tools.preflight.host import Host
from tools.preflight.plan import Finding, Plan

LEVELS = ("error", "warning", "ok")


def findings(host: Host, plan: Plan) -> list[Finding]:
    """The findings of all checks, the worst first."""
    found = [each for check in (*sdk.CHECKS, *checks.CHECKS, *flags.CHECKS) for each in check(host, plan)]
    return sorted(found, key=lambda each: LEVELS.index(each.level))
