"""Judge whether a distilled student's gain comes from better knowledge transfer.

Reads run directories (see :mod:`analysis.runs.token_records`), never torch or fairseq. The commands:

    python -m analysis.transfer RUNS     report, tables and figures
    python -m analysis.figures RUNS      the figures again, from their saved tables
    python -m analysis.gap RUNS          how much of the teacher's lead each student has closed
    python -m analysis.plan RUNS         how many seeds and sentences detect a given gain
    python -m analysis.compare           any systems' translations, from plain text files
"""
