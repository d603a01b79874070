#!/bin/sh
# Everything that docs/results/starved/ plans, in its order. What is finished is not done again: start it as often as needed.
#
# Command:   sh recipes/starved/queue.sh <CIFAR-10> <directory of Fashion-MNIST's idx files> [<folder of results>]
# Settings:  JOBS (2) runs at a time; OMP_NUM_THREADS (1) threads of each
# Stop:      end the whole process group, or the runs that are under way go on
# Hardware:  two CPU cores for about fifteen hours (docs/results/starved/README.md has the sum)
set -u
cifar=$1 fashion=$2 results=${3:-docs/results}
recipes=$(dirname "$0")/..
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

table() { python "$recipes/run_table.py" "$@" --jobs "${JOBS:-2}" --results "$results"; }

analysis() {  # Table 4 and the similarity of the tokens, while the networks of a seed are on this machine
    runs=outputs/starved place=$results/starved/analysis
    mkdir -p "$place"
    for seed in 0 1 2 3 4; do
        [ -e "$place/disagreement-seed$seed.json" ] && continue
        [ -e "$runs/ablations/two_class_tokens-seed$seed/all_results.json" ] || continue
        python "$recipes/run_analysis.py" --dataset_name "$cifar" --teacher "$runs/starved/convnet_teacher-seed$seed" \
            --models "$runs/imagenet/deit_base-seed$seed,$runs/imagenet/deit_base_distilled-seed$seed,$runs/ablations/two_class_tokens-seed$seed" \
            --output_dir "outputs/starved/analysis-seed$seed" --num_workers 0 || continue
        for subject in disagreement token_similarity; do
            cp "outputs/starved/analysis-seed$seed/$subject.json" "$place/$subject-seed$seed.json"
        done
    done
}

table 3 --scale starved --dataset_name "$cifar"
table 3 --scale starved_fashion --data_dir "$fashion"
table tokens --scale starved --dataset_name "$cifar"
analysis
for name in data figure3 2; do table $name --scale starved --dataset_name "$cifar"; done
for name in 8 3; do table $name --scale starved_table9 --dataset_name "$cifar"; done
for name in fine_tuning added; do table $name --scale starved --dataset_name "$cifar"; done
