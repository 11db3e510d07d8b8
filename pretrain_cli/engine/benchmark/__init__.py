"""What a training step costs here, setting by setting: the real `train_step`, on synthetic tokens.

    arms       what is asked             → arms: a workload and the speed settings it runs with
    rounds     arms                      → each in turn, a fresh process each time, so many rounds
    timing     an arm, in its process    → times of its steps, losses, memory
    peers      the same step, computed by another program
    results    rounds                    → medians, rates, MFU; what learned something else is told
    record     results                   → JSON, and two of these compared
    markdown, picture                    → a table, a chart

`data` and `tokenize` measure what comes before a step: reading batches, and text to tokens.
"""
