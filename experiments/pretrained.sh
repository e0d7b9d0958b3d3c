#!/bin/sh
# SmolLM2-135M made a reader, adapted on books, and compared: the commands behind experiments/*_pretrained.
#
#   sh experiments/pretrained.sh convert  SOURCE WORK
#   sh experiments/pretrained.sh controls WORK DATA     one GPU, about 10 minutes
#   sh experiments/pretrained.sh deeper   WORK DATA     one GPU, about 20 minutes
#   sh experiments/pretrained.sh evaluate WORK VALIDATION MODEL...
#
# SOURCE is the GGUF file or a Transformers directory, DATA and VALIDATION are what `longread prepare` wrote with the
# converted model's tokenizer, WORK is a directory for everything that comes out.
set -eu
longread() { python3 -m longread "$@"; }
trained() { # NAME READER OPTIONS...
    name=$1 reader=$2
    shift 2
    [ -d "$work/$name/model" ] || longread train "$work/$reader" --data "$data" --out "$work/$name" "$@" \
        > "$work/$name.log" 2>&1 || tail -3 "$work/$name.log"
}
what=$1
case $what in
convert)
    longread convert "$2" "$3/reader" --suffix 8
    longread convert "$2" "$3/deeper-reader" --suffix 15
    ;;
controls)
    work=$2 data=$3 tokens=13107200
    trained e2e reader --tokens $tokens --set meta_gradient=exact
    trained swa reader --tokens $tokens --method swa
    trained full reader --tokens $tokens --method full
    trained first-order reader --tokens $tokens --set meta_gradient=first-order
    ;;
deeper)
    work=$2 data=$3
    trained deeper deeper-reader --tokens "${TOKENS:-65536000}" --set meta_gradient=exact
    ;;
evaluate)
    work=$2 validation=$3
    shift 3
    for name in "$@"; do
        longread evaluate "$work/$name" --data "$validation" --max-tokens 131073 \
            --lengths 1024 2048 4096 8192 16384 32768 65536 131072 --json "$work/$name.json" \
            > "$work/$name-evaluate.log" 2>&1 || tail -3 "$work/$name-evaluate.log"
    done
    ;;
esac
