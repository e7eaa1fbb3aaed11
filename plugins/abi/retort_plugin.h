/*
 * retort_plugin.h: the binary interface between the retort runner (the host) and a backend plugin.
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * This header is the source of truth. It is valid C11 and C++17 and needs nothing but <stddef.h> and <stdint.h>. A plugin is
 * a shared object that exports exactly one symbol, `retort_plugin_v1`, which returns a table of functions. Everything except
 * metrics and progress crosses as JSON text; the messages are described below.
 *
 * THE LIFE OF A PLUGIN
 *
 *   The host loads the plugin in a child process of its own (a "worker"), one plugin per process, with
 *   dlopen(RTLD_NOW | RTLD_LOCAL), and never unloads it: the worker calls _exit once the answer has been sent.
 *   The plugin therefore need not clean up threads and thread-local destructors, and atexit handlers do not run.
 *   A crash, an abort or a hang ends the worker, never the runner. The process contains faults; it is not a sandbox:
 *   plugins are trusted code.
 *
 *   A worker calls `retort_plugin_v1` once, then any of the table's functions, one at a time, from one thread.
 *   The plugin may start threads of its own.
 *
 * VERSIONS
 *
 *   The major version is part of the symbol's name. Within a major version tables only grow, at their end:
 *
 *   - Each side fills in `struct_size` (sizeof its table as it was compiled) and `abi_minor` (RETORT_ABI_MINOR as it
 *     was compiled), and never reads a member that does not lie wholly within the other side's struct_size.
 *     RETORT_HAS(table, member) checks this, and that the member is not NULL.
 *   - A table smaller than that of minor version 0 is refused as truncated.
 *   - A plugin that cannot work without something newer raises `min_host_minor`; the host refuses to load it when its
 *     own minor version is lower. Otherwise any pair of minor versions works together.
 *   - `reserved` and `ext` are 0 and NULL. `ext` is where experiments live before they become members.
 *   - JSON messages evolve by added fields; both sides ignore fields that they do not know.
 *
 * MEMORY
 *
 *   No ownership crosses the boundary. A retort_str is borrowed for the duration of the call it is passed to: UTF-8,
 *   not NUL-terminated, data may be NULL when len is 0. Results leave through sinks, whose write function copies what
 *   it is given before it returns; several writes are joined. The plugin's table and what it points to live as long as
 *   the process; the host's table lives until the call that it was passed to returns.
 *
 * ERRORS
 *
 *   Functions return a status code. With any status but RETORT_OK the callee writes a Failure into the error sink:
 *
 *     {"code": "...", "message": "...", "chain": ["cause", ...], "retryable": false, "pointer": "/lr", "hint": "..."}
 *
 *   Only code and message are required. Codes: invalid_options, missing_input, bad_data, out_of_memory, numerical, io,
 *   cancelled, worker_lost, workers_differ, unsupported, panic, internal. Exceptions, panics and longjmp never unwind
 *   across the boundary. worker_lost: a process of a training lost contact with another one, and the
 *   training may be tried again. workers_differ: the processes of a training no longer hold the same weights.
 *
 * CALLBACKS
 *
 *   Members of retort_host may be called from any thread, by several at once, until the call that received the table
 *   returns; not afterwards, and not from a signal handler. They copy their arguments and do not call the plugin back.
 *   log, metric, progress and cancelled are cheap and do not wait for disks or for the runner.
 *
 * CANCELLATION
 *
 *   A running stage asks `cancelled` about once per step. RETORT_CANCEL_CHECKPOINT: save the work done so far in the
 *   job's work_dir and return RETORT_CANCELLED (a Failure with code cancelled). RETORT_CANCEL_NOW: return at once.
 *   A stage that does not return within the grace period (30 seconds) is sent SIGTERM and, 5 seconds later, SIGKILL.
 *
 * FILES
 *
 *   A stage's results are artifacts: directories of files. artifact_begin gives the path of an empty staging directory;
 *   the plugin writes files there (regular files and directories, no links); artifact_commit syncs, hashes and
 *   publishes it under its content hash, or artifact_abort drops it. A staging directory that was not committed is
 *   removed when the stage ends, whichever way it ends. Input artifacts are read-only. Files that let a later attempt
 *   of the same stage continue belong in the job's work_dir, which survives attempts until the stage succeeds.
 */
#ifndef RETORT_PLUGIN_H
#define RETORT_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Major version: part of the entry symbol's name. */
#define RETORT_ABI_MAJOR 1u
/* Minor version of the tables below. */
#define RETORT_ABI_MINOR 0u
/* Name of the entry symbol. */
#define RETORT_ENTRY "retort_plugin_v1"

/* Status codes. Unknown ones mean RETORT_FAILED. */
#define RETORT_OK 0
/* The error sink holds a Failure. */
#define RETORT_FAILED 1
/* Stopped because `cancelled` said so; the error sink holds a Failure with code cancelled. */
#define RETORT_CANCELLED 2
/* The callee cannot do this, here or at all; the error sink holds a Failure. */
#define RETORT_UNSUPPORTED 3

/* Severity of a log line. */
#define RETORT_LOG_ERROR 1u
#define RETORT_LOG_WARN 2u
#define RETORT_LOG_INFO 3u
#define RETORT_LOG_DEBUG 4u
#define RETORT_LOG_TRACE 5u

/* Answers of `cancelled`. */
#define RETORT_CANCEL_RUN 0u
#define RETORT_CANCEL_CHECKPOINT 1u
#define RETORT_CANCEL_NOW 2u

/* Whether the other side's table has a member, going by its struct_size, and the member is set. */
#define RETORT_HAS(table, member) \
    ((table)->struct_size >= (uint32_t)((const char *)(&(table)->member + 1) - (const char *)(table)) && \
     (table)->member != NULL)

/* Whether a symbol is visible outside the shared object; build everything else with -fvisibility=hidden. */
#if defined(_WIN32)
#define RETORT_EXPORT __declspec(dllexport)
#else
#define RETORT_EXPORT __attribute__((visibility("default")))
#endif

/* Borrowed text: UTF-8, not NUL-terminated, valid during the call it is passed to. */
typedef struct retort_str {
    const char *data;
    uint64_t len; /* bytes */
} retort_str;

/* Takes text out of a callee: write copies len bytes of data before it returns; several writes are joined. */
typedef struct retort_sink {
    void *ctx;
    void (*write)(void *ctx, const char *data, uint64_t len);
} retort_sink;

/*
 * The services of the host. Every function takes ctx as its first argument.
 * In `probe` and `validate` the artifact functions answer RETORT_UNSUPPORTED and metric and progress do nothing.
 */
typedef struct retort_host {
    uint32_t struct_size;
    uint32_t abi_minor;
    const void *ext; /* NULL */
    void *ctx;

    /* Writes a line to the run's log. */
    void (*log)(void *ctx, uint32_t level, retort_str message);
    /* Appends a point to the series `name`. NaN and infinities are values. Of two points with the same name and step
     * the later one stands. */
    void (*metric)(void *ctx, retort_str name, uint64_t step, double value);
    /* Says how far the stage is: done of total (0: unknown) units ("steps", "samples"). */
    void (*progress)(void *ctx, uint64_t done, uint64_t total, retort_str unit);
    /* Whether to go on: RETORT_CANCEL_*. */
    uint32_t (*cancelled)(void *ctx);

    /* Opens a staging directory for an artifact of a kind ("student") with a name for people. Writes its id to *id and
     * its absolute path to path_out. */
    int32_t (*artifact_begin)(void *ctx, retort_str kind, retort_str name, uint64_t *id, retort_sink path_out,
                              retort_sink err);
    /* Publishes the staged files. meta_json is a JSON object (or empty) with facts about the artifact; three fields
     * mean something to the host: "table" {"title", "columns": [..], "rows": [[..], ..]} is shown when the run ends,
     * "preview" is the path within the artifact of an image worth looking at, and "caption" says what it shows. May
     * take as long as the disk does. */
    int32_t (*artifact_commit)(void *ctx, uint64_t id, retort_str meta_json, retort_sink err);
    /* Drops the staged files. */
    void (*artifact_abort)(void *ctx, uint64_t id);
} retort_host;

/* What a plugin offers. All members of minor version 0 are required. */
typedef struct retort_plugin {
    uint32_t struct_size;
    uint32_t abi_minor;
    uint32_t min_host_minor; /* lowest RETORT_ABI_MINOR of a host that the plugin can work with */
    uint32_t reserved;       /* 0 */
    const void *ext;         /* NULL */

    /*
     * Describes the plugin. Pure: it returns the same text at every call, touches no device and writes nothing. The host
     * caches the answer until the plugin's file changes.
     *
     *   {"name": "candle", "version": "0.1.0", "summary": "...", "license": "MIT", "devices": ["cpu", "cuda"],
     *    "dtypes": ["f32"], "families": ["llamagen"], "libraries": ["libtorch 2.13.0 in /opt/libtorch/lib"],
     *    "stages": [{"kind": "distill", "summary": "...", "output": "student", "revision": 0, "divisible": false,
     *                "schema": {...}}]}
     *
     * A schema is a JSON Schema (2020-12) of the stage's options: an object schema with additionalProperties false and
     * defaults. On strings, "x-retort-artifact": ["teacher", ...] marks the name of another stage whose output has one of
     * these kinds, and "x-retort-file": "file" | "dir" | "images" | "weights" marks a path (images: a folder, of which only
     * image files, tables and archives of them count; weights: a file, or the folder or index of several).
     * "x-retort-same-result": true, on any schema, says that another value of that option gives the same output, so that its
     * result can be reused. "x-retort-prepared": {"kind": "images", "sources": ["folder"], "own": ["flip"]}, on an option's
     * schema, says that a stage of that kind can prepare the data in this option, given the same option without `own`; where
     * several stages have the same data with one of `sources`, the host adds such a stage: see `prepared` in `run`. Raise
     * `revision` when the same options give a different result than before. `divisible` (default false) says that several
     * processes can share the work: see `run`. `together` (default false) also says that these processes work on the same
     * result and wait for each other.
     */
    int32_t (*describe)(retort_sink out, retort_sink err);

    /*
     * The devices really present, or why they cannot be used:
     *
     *   [{"name": "cpu", "model": "...", "memory": 17179869184}, {"name": "cuda:0", "unusable": "driver too old"}]
     */
    int32_t (*probe)(const retort_host *host, retort_sink out, retort_sink err);

    /*
     * Checks a stage's options beyond their schema; touches no device, reads no artifact. stage_json is a job as in `run`
     * without work_dir and inputs. It may have the stages on which this one depends, directly or not:
     *
     *    "sources": {"teacher": {"kind": "pretrain", "options": {...}}, ...}
     *
     * Of very large recipes some are left out. Writes findings, an empty array if there are none:
     *
     *   [{"severity": "error" | "warning", "pointer": "/schedule/warmup", "message": "...", "hint": "..."}]
     *
     * A finding is not a failure: the status is RETORT_OK whenever the check itself worked.
     */
    int32_t (*validate)(const retort_host *host, retort_str stage_json, retort_sink diagnostics, retort_sink err);

    /*
     * Runs a stage:
     *
     *   {"stage": "student", "kind": "distill", "options": {...}, "seed": 17, "device": "cpu", "dtype": "f32",
     *    "threads": 2, "base_dir": "/where/relative/paths/start", "work_dir": "/survives/attempts",
     *    "inputs": {"teacher": {"kind": "teacher", "path": "/dir", "hash": "64 hex digits"}}}
     *
     * Options are complete: defaults are filled in. A reference in the options names a stage; its artifact is under
     * that name in inputs. Where another stage has prepared data that the options hold themselves,
     *
     *    "prepared": {"/data": "pictures"}
     *
     * names the input with it by the option's pointer; a plugin may read the data instead. Result: the id of the committed
     * artifact that references to this stage stand for, and facts worth keeping:
     *
     *   {"output": 1, "summary": {...}}
     *
     * The summary, and the facts about an artifact, are at most 4 MiB of JSON each; larger ones fail the stage.
     *
     * A stage of a divisible kind may be divided among processes that run at the same time, in the same work_dir. Their
     * jobs have one more member:
     *
     *   "part": {"index": 0, "of": 3}
     *
     * Each does its part of the work (of numbered pieces those whose number modulo `of` is `index`), leaves what it makes in
     * work_dir, commits no artifact and returns {"output": 0}. When all have succeeded, the job runs without a part: it finds
     * their output, makes what is missing and commits the artifact. Parts write different files, or lock a file that they
     * share. The artifact does not depend on `of`.
     *
     * If the kind has `together`, all parts are started at the same time, on this machine or on several nodes of one job. The
     * environment of each has MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE, by which they find each other. Only
     * part 0 reports metrics and progress. A part that fails because another is gone sets "retryable": true; the end of the
     * other is then the recorded reason. The last decimals of the artifact may depend on `of`.
     */
    int32_t (*run)(const retort_host *host, retort_str stage_json, retort_sink result, retort_sink err);
} retort_plugin;

/* The only exported symbol. Returns the same table at every call and does nothing else. */
RETORT_EXPORT const retort_plugin *retort_plugin_v1(void);

#ifdef __cplusplus
}
#endif

#endif /* RETORT_PLUGIN_H */
