"""`pretrain report`: what runs wrote down, as one page and as a picture. Without torch.

rows        metrics.jsonl, samples.jsonl  → rows, and how many lines are damaged
history     a run folder                  → curves, marks, samples, settings
thinning    a long curve                  → means of buckets, with their lowest and highest
charts      histories                     → which curves are drawn together, and what is missing
tables      histories                     → the parts of the page that are text
page        all of it                     → one HTML file, with page.css and page.js inside
picture     the charts                    → a PNG, with matplotlib
"""
