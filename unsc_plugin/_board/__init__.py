"""How records become a board: numbers, standings, tables and a plot; `leaderboard.py` shows them."""
