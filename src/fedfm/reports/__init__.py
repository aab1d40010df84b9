"""A run as a page a person reads: ``render(folder)`` writes ``report.html``, ``python -m fedfm.reports RUN`` does the same."""

from fedfm.reports.page import html as html
from fedfm.reports.page import render as render
from fedfm.reports.table import comparison_lines as comparison_lines
from fedfm.reports.table import comparison_table as comparison_table
from fedfm.reports.table import show_comparison as show_comparison
