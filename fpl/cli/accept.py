"""fpl accept: fresh tables and figures become the expected ones of the repository."""

from fpl.cli.options import Options, Parser


def add(parser: Parser) -> None:
    """There are no options."""


def run(options: Options) -> None:
    """Take over the fresh tables and figures as the expected ones, and fill in the pages."""
    from fpl.experiments import expected, pages, tables, values

    values.profile()
    expected.accept(tables.TABLES)
    pages.fill_pages()
