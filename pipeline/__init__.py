"""onehour's trainer: ImageNet training whose one input is a DeepSpeed JSON file.

Three layers, and imports only point down:

1. the pure core, without torch: `schema`, `config`, `batch`, `schedule`, `order`, `plan`, `hosts`;
2. the parts: `reader`, `augment`, `decode`, `loader`, `model`, `evaluate`, `checkpoint`, `metrics`, `record`,
   `monitor`;
3. the run: `engine` (the only module that imports deepspeed), `train`, `report`, `launch`, `cli`.
"""
