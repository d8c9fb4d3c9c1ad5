"""Judge whether a distilled student's gain comes from better knowledge transfer.

Reads run directories (see :mod:`analysis.runs.token_records`), never torch or fairseq. The commands:

    python -m analysis.transfer RUNS     report, tables and figures
    python -m analysis.figures RUNS      the figures again, from their saved tables
"""
