"""The written report: what it says, and how it is laid out.

===============  ==================================================================================
blocks           what a chapter consists of: prose, tables, drawings
findings         what was found and how sure it is, in a paragraph
content          the chapters of a report
latex            tables for a paper
document         Markdown, HTML, CSV and LaTeX, written into a folder
===============  ==================================================================================
"""
