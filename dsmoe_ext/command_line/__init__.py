"""The command `dsmoe`: `app` has the commands, `options` what they share, `console` how they talk.

`steps` is the work that commands and the demo share.
"""
