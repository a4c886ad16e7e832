"""Milepost: a live progress page for machines that a GitHub Actions workflow provisions.

Nothing is imported here: gevent's patch (in `serving`) has to come before everything else.
"""
