"""The command line of the key broker: serve it, and administer it over its admin listener.

Heavy imports are deferred into the verbs, so that ``kbs --help`` and completion stay fast.
"""

from __future__ import annotations

import sys

import typer

from cai.terminal import run_app
from kbs.cli import admin, audit, db, lease, policy, proposal, reference, resource, stock
from kbs.cli.admin_call import connection
from kbs.cli.revoke import revoke, unrevoke
from kbs.cli.serve import serve

app = typer.Typer(
    name="kbs",
    help="Give a model's key to a guest that proved itself, and to nobody else.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.add_typer(resource.app, name="resource")
app.add_typer(policy.app, name="policy")
app.add_typer(reference.app, name="reference")
app.add_typer(lease.app, name="lease")
app.command()(revoke)
app.command()(unrevoke)
app.add_typer(admin.app, name="admin")
app.add_typer(proposal.app, name="proposal")
app.add_typer(audit.app, name="audit")
app.add_typer(db.app, name="db")
app.callback()(connection)
stock.add_verbs(app)


def main() -> None:
    """Entry point of the console script ``kbs``."""
    sys.exit(run_app("kbs", app))
