"""The stages of a run, one folder each. Imports go down this list only:

report, benchmark → export, evaluation → training → sampling, planning → runs → optim → runtime
"""
