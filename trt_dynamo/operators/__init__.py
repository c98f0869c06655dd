"""Ops of ours in torch's dispatcher: torch functions under another name, so that AOTAutograd leaves them whole."""
