"""The claims about better transfer: evidence, what chance alone shows, verdicts.

===============  ==================================================================================
evidence         what decides, or accompanies, each claim: by seed, observed and resampled
verdicts         effects, intervals, corrected p-values, and the verdict of each claim
===============  ==================================================================================
"""
