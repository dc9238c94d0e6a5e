"""What the scripts share: one subject a room, imported and never run.

A room may import those above it in this list, never one below (tests/test_house.py):

    command_line    errors in one line, exit statuses, files replaced whole, hashes, stored commands
    machine         its name, the precision it trains in fastest, what a process costs
    data            files to checked tables, NLI triplets, file records
    formats         pairs and triplets of a person's own files, by their form
    evaluation      the eight correlations, bootstrap, paired differences
    encoders        fetch, check, load, save an encoder; its default prompt, its pooling
    exported        an exported .onnx file as an encoder
    scoring         pairs of sentences encoded and scored
    splits          what a recipe trains on and is scored on: joined, split, what they share
    batches         orders of rows: shuffled, without duplicates, shared; batches on their way
    dropout         its draws on a CPU
    packing         one forward without padding for all columns of a batch
    graphs          an encoder's layers as CUDA graphs
    two_tasks       an optimizer for two tasks that take turns
    results         result files, their tables, the generated parts of Markdown files
    checkpoints     which are whole, which are needed, reading one back
    model_card      the model card of a finished run
    run_folder      a run on disk: options, data, resume, scores, upload
    averaging       means of weights, and which of them dev prefers
    options         the options that all recipes have, and their checks
    training        the trainer, its callbacks, `train`
    experiment_log  the log of training runs: rows, groups, tables
    whole_runs      what whole runs cost and give: their table, the first page's
    plots           the pictures of results/
"""
