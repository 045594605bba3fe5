#!/bin/sh
# Starts vLLM on a checkpoint in S3, streamed into memory: vllm-s3.sh s3://BUCKET/PREFIX JOB STEP [VLLM OPTION...]
# AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say which S3 and as whom. The prefix
# hf/ holds a Hugging Face directory and nothing else, which is what the streamer wants. To follow
# a job, use vllm.py: a running engine cannot read its weights from S3 again.
set -eu
[ $# -ge 3 ] || { echo "usage: vllm-s3.sh s3://BUCKET/PREFIX JOB STEP [VLLM OPTION...]" >&2; exit 2; }
store=${1%/} job=$2 step=$3
shift 3
case $store in s3://?*) ;; *) echo "vllm-s3.sh: store $store, expected s3://BUCKET/PREFIX" >&2; exit 2 ;; esac
case $step in *[!0-9]*|'') echo "vllm-s3.sh: step $step, expected a number" >&2; exit 2 ;; esac
attempt=${TRAINERD_ATTEMPT:-0} # the second number of the checkpoint's prefix
export RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="${RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING:-0}" AWS_EC2_METADATA_DISABLED=true
exec "${VLLM:-vllm}" serve "$store/jobs/$job/checkpoints/$(printf %08d "$step")-$attempt/hf" --load-format runai_streamer "$@"
