"""Turn settings into a plan: resolve every `auto`, and estimate memory and time.

Read `plan` first.
"""
