"""What a case would take: predicted from a configuration, without weights, GPU or torch.

`predict` answers one case, `fit` many; `gpus` is the table of devices. The rules are the
frameworks' own (`frameworks/_rules`).
"""
