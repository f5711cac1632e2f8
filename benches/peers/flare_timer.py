"""A component for FLARE's server that notes how long each round took."""

import json
import time

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType


class RoundTimer(FLComponent):
    """From just before the model is sent until the aggregate is there; FLARE writes it to the disk after that."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = out
        self.begun = 0.0

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """FLARE calls this for every event."""
        if event_type == AppEventType.ROUND_STARTED:
            self.begun = time.perf_counter()
        elif event_type == AppEventType.AFTER_AGGREGATION:
            seconds = time.perf_counter() - self.begun
            values = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT).params["numpy_key"]
            line = {
                "seconds": seconds,
                "size": int(values.size),
                "low": float(values.min()),
                "high": float(values.max()),
            }
            with open(self.out, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
