"""The values that stored bytes stand for, in plain torch. Knows no file and no kernel."""
