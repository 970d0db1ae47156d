"""How records become a board: numbers, standings, tables, a plot; `leaderboard.py` shows them."""
