"""onehour's trainer: ImageNet training whose one input is a DeepSpeed JSON file.

Three layers, and imports only point down:

1. the pure core, without torch: `schema`, `deepspeed_schema`, `deepspeed_keys`, `config`, `batch`, `schedule`,
   `order`, `window`, `augment`, `dataset`, `plan`, `experiment`, `hosts`, `saves`, `resume`, `inventory`, `metrics`,
   `record`, `samples`;
2. the parts: `reader`, `cached`, `stream`, `readers`, `decode`, `loader`, `model`, `stochastic`, `evaluate`,
   `checkpoint`, `saver`, `sums`, `together`;
3. the run: `engine` (the only module that imports deepspeed), `monitor`, `run`, `train`, `assess`, `report`,
   `launch`, `cli`.
"""
