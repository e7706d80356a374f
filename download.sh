#!/usr/bin/env bash
# Downloads the Llama 2 weights that Meta publishes, into the folders that this library (and Meta's) expects.
# Runs under bash 3.2 and later, on Linux and macOS; `bash download.sh --help` tells how to use it.
#
# A file has its own name only once it is whole and its checksum is right; until then it is NAME.part.
crlf=
[ -z "$crlf" ] || { printf '%s\n' "Windows line ends: run  tr -d '\r' < download.sh > d.sh; bash d.sh" >&2; exit 1; } #
if [ -z "${BASH_VERSION:-}" ]; then  # started as `sh download.sh`: everything up to `fi` is plain sh
    if [ -f "$0" ] && command -v bash > /dev/null; then exec bash "$0" "$@"; fi
    echo "download.sh needs bash: install it and run  bash download.sh" >&2; exit 1
fi

set -fu             # no globbing: the URL has a * and a ?;  no `set -e`: each failure is told in its own words
export LC_ALL=C     # the tools' words and the character classes are then the same everywhere
readonly known=7B,13B,70B,7B-chat,13B-chat,70B-chat
readonly request=https://ai.meta.com/resources/models-and-libraries/llama-downloads/

usage() {
    cat << END
Usage: bash download.sh [--url URL] [--models LIST] [--to DIR]

  --url URL      the link from Meta's e-mail, between single quotes   (or set LLAMA_URL, which keeps it out of 'ps')
  --models LIST  all, or some of $known  (or set LLAMA_MODELS)
  --to DIR       where the folders llama-2-7b, ... go; default: here  (or set LLAMA_DIR)

On a terminal, what is missing is asked for. Ask Meta for a link at
$request
A 7B model takes about 13 GB, 13B 25 GB, 70B 129 GB. Run the same command again to go on after any interruption:
what is here and has the right checksum is skipped, and a file that has begun is resumed.
END
}

die() {
    printf 'download.sh: %s\n' "$*" >&2
    exit 1
}

note() { if [ -t 2 ]; then printf '%s\n' "$*" >&2; fi; }  # something passing: only for somebody who watches

# The link as people really paste it: each mistake has its own sentence. It is a secret, so none repeats it.
check_url() {
    local legal='A-Za-z0-9._~:/?#@!$&()*+,;=%-' host=${url#*://}
    host=${host%%[/?#]*}
    case $url in
        '') die "the URL is empty: paste the link from Meta's e-mail." ;;
        *[[:space:]]*) die "the URL has a space or a line break: copy it again, as one line with nothing after it." ;;
        *[!$legal]*) die "the URL has a quote, a backslash or another character that no URL has: paste it just as" \
            "the e-mail has it (single quotes belong around it on a command line, never at the prompt)." ;;
        *@*) [ "$url" = "${url#http*://}" ] &&
            die "that is an e-mail address: give the URL that Meta sends to it after you ask at $request" ;;
    esac
    case $host in
        *urldefense.* | *safelinks.* | *proofpoint.* | *mimecast* | l.facebook.com | lm.facebook.com | www.google.*)
            die "the URL is wrapped by $host: do not copy the link's target but the text shown in the e-mail" \
                "(https://download.llamameta.net/...)." ;;
    esac
    case $url in
        http*://*://* | http*://*%3[aA]%2[fF]%2[fF]*)
            die "the URL is wrapped in another one: copy the text shown in the e-mail, not the link's target." ;;
        https://?* | http://?*) ;;
        *) die "the URL must begin with https:// : copy it whole from Meta's e-mail." ;;
    esac
    case $url in
        *[.,\;:\)!] | *Select)
            die "the URL ends in something that is not part of it (a full stop, a bracket, 'Select'): leave it out." ;;
        *\**) ;;
        *) die "the URL has no *: copy the whole link from Meta's e-mail, https://download.llamameta.net/*?Policy=..." \
            "and give it between single quotes on a command line." ;;
    esac
}

check_models() {  # and leaves them in $models with spaces between
    local model choose="choose from $known (separated by commas), or all."
    [ "$models" != all ] || models=$known
    models=${models//,/ }
    [ -n "${models// /}" ] || die "the list of models is empty: $choose"
    for model in $models; do
        case ,$known, in *",$model,"*) ;; *) die "unknown model '$model': $choose" ;; esac
    done
}

find_tools() {
    downloader=$(command -v curl || command -v wget)
    hasher=$(command -v md5sum || command -v md5 || command -v openssl)
    downloader=${downloader##*/} hasher=${hasher##*/}
    [ -n "$downloader" ] || die "neither curl nor wget is installed: install one of them."
    [ -n "$hasher" ] || die "none of md5sum, md5 and openssl is installed to verify checksums: install one of them."
    case $downloader in
        curl) if [ -t 2 ]; then bar=(--progress-bar); else bar=(--silent); fi ;;
        wget) if [ -t 2 ]; then bar=(--quiet --show-progress); else bar=(--quiet); fi ;;
    esac
}

size_of() { if [ -f "$1" ]; then echo $(($(wc -c < "$1"))); else echo 0; fi; }

# Is it an error or login page?
is_page() { [ -s "$1" ] && head -c 512 "$1" | grep -aqiE '<html|<!doctype|<\?xml'; }

# is_right FILE SUM: by its checksum, or, where Meta publishes none, by all else that can be asked of it.
# The tools read stdin, since each would decorate a file's name in its own way.
is_right() {
    local sum=''
    if [ ! -s "$1" ] || is_page "$1"; then return 1; fi
    if [ -z "$2" ]; then
        case ${1%.part} in *.chk) grep -Eq '^[0-9a-fA-F]{32} [ *]?[^ ]' "$1" ;; esac
        return
    fi
    case $hasher in
        md5sum) sum=$(md5sum < "$1") && sum=${sum%% *} ;;
        md5) sum=$(md5 -q < "$1") ;;
        openssl) sum=$(openssl md5 < "$1") && sum=${sum##* } ;;
    esac
    [ ${#sum} = 32 ] || die "$hasher could not compute the checksum of $1."
    [ "$sum" = "$2" ]
}

# download PATH PART: one request, resuming PART if it is there; prints the answer's headers.
# The address goes through a pipe because everybody can read command lines in the list of processes.
download() {
    local address=${url%%\**}$1${url#*\*}  # the first * stands for the path
    case $downloader in
        curl) printf 'url = "%s"\n' "$address" |
            curl "${bar[@]}" --fail --location --globoff --connect-timeout 30 --speed-limit 1 --speed-time 60 \
                --continue-at - --output "$2" --dump-header - --config - ;;
        wget) printf '%s\n' "$address" |
            wget "${bar[@]}" --server-response --tries=1 --timeout=60 \
                --continue --output-document="$2" --output-file=- --input-file=- ;;
    esac
}

# transfer PATH PART: all of PATH's bytes are in PART, or the script ends with the reason.
transfer() {
    local path=$1 part=$2 best before size tries=0 headers status code page
    best=$(size_of "$part")
    while :; do
        before=$(size_of "$part")
        headers=$(download "$path" "$part")
        status=$downloader:$?
        # Of the last answer (proxies and redirects answer before it): its status, and whether it is a web page.
        page=$(printf '%s\n' "$headers" | awk '$1 ~ /^HTTP\// {code = $2; page = "no"}
            tolower($0) ~ /^ *content-type: *text\/html/ {page = "yes"} END {print code "/" page}')
        code=${page%/*} page=${page#*/}
        [ "$before" != 0 ] || [ -s "$part" ] || rm -f "$part"  # wget makes the file before it knows the answer

        case $status/$code in
            curl:23/* | wget:3/*)
                die "could not write $part: the disk is full or read-only" \
                    "($(df -Pk "$dir" | awk 'NR == 2 {print int($4 / 1024)}') MB free in $dir)." \
                    "Make room and run the same command again: it goes on from there." ;;
            */2??) ;;
            */416) [ "$before" != 0 ] || die "the server refused to send $path (HTTP 416)."
                return ;;  # nothing is left to send: PART is whole, if its checksum agrees
            */403) die "the server refused $path (HTTP 403): the link has expired (after 24 hours or too many" \
                "downloads), was not copied whole, or is not one for Llama 2. Ask for a new one at $request" \
                "and run again: what is here stays." ;;
            */404) die "the server has no $path (HTTP 404): is this a link for Llama 2?" ;;
            */[345]??) die "the server answered HTTP $code to $path: run the same command again later." ;;
            *) die "could not reach the server ($downloader ended with ${status#*:}): check the network, the proxy" \
                "and the URL's host, then run the same command again." ;;
        esac

        if [ "$status/$page" = curl:33/no ]; then
            rm -f "$part"  # this server cannot send the rest of a file: wget begins again by itself, curl gives up
            continue
        elif [ "$status" = curl:33 ] || is_page "$part"; then
            [ "$status" = curl:33 ] || rm -f "$part"
            die "the server sent a web page in place of $path: the link is wrong or has expired, or a proxy answers" \
                "for it. Copy the URL again as the e-mail shows it, or ask for a new one at $request"
        fi
        [ "${status#*:}" != 0 ] || return 0
        # Cut off. Try again for as long as that brings something new.
        size=$(size_of "$part") tries=$((tries + 1))
        if [ "$size" -le "$best" ] || [ $tries = 20 ]; then
            die "the connection broke at $size bytes of $path: run the same command again to resume it."
        fi
        best=$size
        sleep 1
    done
}

# fetch PATH [CHECKLIST]: PATH is in $dir, whole, and verified if CHECKLIST lists it, or the script ends.
fetch() {
    local path=$1 file=$dir/$1 part=$dir/$1.part want='' resumed
    [ $# = 1 ] || want=$(awk -v name="${path##*/}" '{sub(/\r$/, ""); sub(/^\*/, "", $2)}
        $2 == name {print tolower($1); exit}' "$dir/$2")
    if [ -f "$file" ]; then
        note "$path: verifying"
        if is_right "$file" "$want"; then echo "$path: already here${want:+, checksum right}"; return; fi
        mv -f "$file" "$part" || die "could not rename $file."  # most likely cut off by another downloader
    fi
    if [ -z "$want" ] || is_page "$part"; then rm -f "$part"; fi  # resume only what a checksum can prove
    while :; do
        resumed=$(size_of "$part")
        note "$path: downloading"
        transfer "$path" "$part"
        if is_right "$part" "$want"; then break; fi
        rm -f "$part"
        [ -n "$want" ] || die "what came as $path is not that file and was deleted: ask for a new link at $request"
        [ "$resumed" != 0 ] || die "$path arrived with a wrong checksum and was deleted: run the same command again." \
            "If that does not help, delete $dir/$2 as well."
        note "$path: what it was resumed from was wrong; beginning again"
    done
    mv -f "$part" "$file" || die "could not rename $part."
    echo "$path: downloaded${want:+, checksum right}"
}

url=${LLAMA_URL:-} models=${LLAMA_MODELS:-} dir=${LLAMA_DIR:-.}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit ;;
        --url=* | --models=* | --to=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --url | --models | --to) ;;
        *) die "unknown argument '$1' (see --help)." ;;
    esac
    [ -n "${2:-}" ] || die "$1 needs a value (see --help)."
    case $1 in --url) url=$2 ;; --models) models=$2 ;; --to) dir=$2 ;; esac
    shift 2
done
case $dir in -*) dir=./$dir ;; esac

find_tools
if [ -z "$url" ]; then
    [ -t 0 ] || die "no URL: give --url 'https://...' or set LLAMA_URL (no terminal to ask on)."
    read -rep "Enter the URL from the e-mail: " url  # -e: a terminal alone cuts lines, on macOS after 1024 bytes
fi
check_url
if [ -z "$models" ]; then
    [ -t 0 ] || die "no models: give --models all, or some of $known, or set LLAMA_MODELS (no terminal to ask on)."
    read -rep "Models to download, separated by commas ($known), or Enter for all: " models || die "stopped."
    models=${models:-all}  # but Ctrl-D, above, is no Enter
fi
check_models

trap 'die "stopped: run the same command again to go on."' INT
mkdir -p "$dir" || die "could not make the folder $dir."
for file in LICENSE USE_POLICY.md tokenizer_checklist.chk; do fetch $file; done
fetch tokenizer.model tokenizer_checklist.chk
for model in $models; do
    folder=llama-2-${model/B/b}
    case $model in 7B*) shards='0' ;; 13B*) shards='0 1' ;; 70B*) shards='0 1 2 3 4 5 6 7' ;; esac
    mkdir -p "$dir/$folder" || die "could not make the folder $dir/$folder."
    fetch "$folder/checklist.chk"  # Meta's comes last; here each file is verified as it arrives
    for shard in $shards; do fetch "$folder/consolidated.0$shard.pth" "$folder/checklist.chk"; done
    fetch "$folder/params.json" "$folder/checklist.chk"
    echo "$dir/$folder is complete"
done
