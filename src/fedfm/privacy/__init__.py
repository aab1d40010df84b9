"""Differential privacy as mathematics: what releases spend, and how much noise a budget asks for. It has no role in a round."""

from fedfm.privacy.accounting import calibrate as calibrate
from fedfm.privacy.accounting import calibrate_skellam as calibrate_skellam
from fedfm.privacy.accounting import epsilon_of as epsilon_of
from fedfm.privacy.accounting import require_numbers as require_numbers
