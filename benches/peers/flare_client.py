"""FLARE's client: answers every model with an update of its size, without training."""

import numpy as np
import nvflare.client as flare

flare.init()
index = int(flare.get_site_name().rsplit("-", 1)[1]) - 1
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    values = np.full(model.params["numpy_key"].size, index + 1, np.float32)
    flare.send(flare.FLModel(params={"numpy_key": values}, meta={"NUM_STEPS_CURRENT_ROUND": 100 + index}))
