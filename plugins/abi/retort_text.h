/*
 * retort_text.h: text in and out of a plugin written in C or C++: borrowed strings, sinks, and as much JSON as it takes
 * to read a job. Optional: a plugin with a JSON library of its own needs retort_plugin.h alone.
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * A value of a job is found by its JSON pointer (RFC 6901; `~` escapes are not known): "/options/rounds". If it is missing or
 * has another type, the caller's default is returned. Valid C11 and C++17, all inline.
 */
#ifndef RETORT_TEXT_H
#define RETORT_TEXT_H

#include "retort_plugin.h"

#include <stdlib.h>
#include <string.h>

/* A C string as borrowed text. */
static inline retort_str retort_string(const char *text) {
    retort_str s = {text, strlen(text)};
    return s;
}

/* Writes a C string into a sink. */
static inline void retort_put(retort_sink sink, const char *text) {
    sink.write(sink.ctx, text, strlen(text));
}

/* Writes a C string (UTF-8) into a sink as a JSON string, with its quotes. */
static inline void retort_put_json(retort_sink sink, const char *text) {
    static const char hex[] = "0123456789abcdef";
    const char *from = text;
    retort_put(sink, "\"");
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;
        if (byte >= 0x20 && byte != '"' && byte != '\\')
            continue;
        char escape[7] = {'\\', 'u', '0', '0', hex[byte >> 4], hex[byte & 15], 0};
        sink.write(sink.ctx, from, (uint64_t)(text - from));
        retort_put(sink, escape);
        from = text + 1;
    }
    retort_put(sink, from);
    retort_put(sink, "\"");
}

/* Writes a Failure; returns the status, so that a function can end with `return retort_fail(...)`. */
static inline int32_t retort_fail(retort_sink err, int32_t status, const char *code, const char *message) {
    retort_put(err, "{\"code\":");
    retort_put_json(err, code);
    retort_put(err, ",\"message\":");
    retort_put_json(err, message);
    retort_put(err, "}");
    return status;
}

/* Takes text out of a sink: what does not fit is cut off. Begins as zeros: {0}, in C++ {}. */
typedef struct retort_buffer {
    size_t len;
    char text[4096]; /* ends with NUL */
} retort_buffer;

static inline void retort_buffer_write(void *ctx, const char *data, uint64_t len) {
    retort_buffer *buffer = (retort_buffer *)ctx;
    size_t room = sizeof buffer->text - 1 - buffer->len;
    size_t taken = len < room ? (size_t)len : room;
    if (taken)
        memcpy(buffer->text + buffer->len, data, taken);
    buffer->len += taken;
    buffer->text[buffer->len] = 0;
}

/* A sink that writes into a buffer. */
static inline retort_sink retort_into(retort_buffer *buffer) {
    retort_sink sink = {buffer, retort_buffer_write};
    return sink;
}

static inline const char *retort_json_blank(const char *at, const char *end) {
    while (at < end && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t'))
        at++;
    return at;
}

/* Past the value, or the key, that begins here. */
static inline const char *retort_json_skip(const char *at, const char *end) {
    int depth = 0;
    do {
        if (at >= end)
            return end;
        if (*at == '"') {
            for (at++; at < end && *at != '"'; at++)
                at += *at == '\\';
            at = at < end ? at + 1 : end;
        } else if (*at == '{' || *at == '[') {
            depth++;
            at++;
        } else if (*at == '}' || *at == ']') {
            depth--;
            at++;
        } else if (depth > 0) {
            at++;
        } else {
            while (at < end && !strchr(",:]} \n\r\t", *at))
                at++;
        }
    } while (depth > 0);
    return at;
}

/* The text of the value that a pointer names; data is NULL when it is not there. */
static inline retort_str retort_json_at(retort_str json, const char *pointer) {
    const retort_str none = {NULL, 0};
    const char *at = json.data, *end = json.data ? json.data + json.len : NULL;
    while (*pointer == '/') {
        const char *name = pointer + 1;
        size_t length = strcspn(name, "/");
        unsigned long index = 0, wanted = strtoul(name, NULL, 10);
        pointer = name + length;
        at = retort_json_blank(at, end);
        if (at >= end || (*at != '{' && *at != '['))
            return none;
        char open = *at++;
        for (;;) {
            int hit;
            at = retort_json_blank(at, end);
            if (at >= end || *at == '}' || *at == ']')
                return none;
            if (open == '{') {
                const char *key = at;
                at = retort_json_skip(at, end);
                hit = (size_t)(at - key) == length + 2 && memcmp(key + 1, name, length) == 0;
                at = retort_json_blank(at, end);
                if (at >= end || *at != ':')
                    return none;
                at = retort_json_blank(at + 1, end);
            } else {
                hit = index++ == wanted;
            }
            if (hit)
                break;
            at = retort_json_blank(retort_json_skip(at, end), end);
            if (at >= end || *at != ',')
                return none;
            at++;
        }
    }
    at = retort_json_blank(at, end);
    if (at == end)
        return none;
    retort_str found = {at, (uint64_t)(retort_json_skip(at, end) - at)};
    return found;
}

/* A number of the job as text that ends with NUL; empty when it is not there. */
static inline void retort_json_number_text(retort_str json, const char *pointer, char out[64]) {
    retort_str value = retort_json_at(json, pointer);
    size_t length = value.len < 64 ? (size_t)value.len : 0;
    if (length)
        memcpy(out, value.data, length);
    out[length] = 0;
}

/* A whole number that is not negative, such as the seed. */
static inline uint64_t retort_json_u64(retort_str json, const char *pointer, uint64_t otherwise) {
    char text[64], *rest;
    retort_json_number_text(json, pointer, text);
    uint64_t value = strtoull(text, &rest, 10);
    return rest == text || *rest || *text == '-' ? otherwise : value;
}

/* A number. */
static inline double retort_json_double(retort_str json, const char *pointer, double otherwise) {
    char text[64], *rest;
    retort_json_number_text(json, pointer, text);
    double value = strtod(text, &rest);
    return rest == text || *rest ? otherwise : value;
}

static inline unsigned retort_json_hex4(const char *at, const char *end) {
    char digits[5] = {0};
    if (end - at < 4)
        return 0;
    memcpy(digits, at, 4);
    return (unsigned)strtoul(digits, NULL, 16);
}

/* Copies a string as UTF-8 that ends with NUL; returns 1, or 0 when it is not there or does not fit. */
static inline int retort_json_copy(retort_str json, const char *pointer, char *out, size_t size) {
    static const char plain[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    retort_str value = retort_json_at(json, pointer);
    size_t n = 0;
    if (value.len < 2 || *value.data != '"')
        return 0;
    const char *end = value.data + value.len - 1;
    for (const char *at = value.data + 1; at < end; at++) {
        unsigned point = (unsigned char)*at;
        if (n + 5 > size)
            return 0;
        if (point != '\\') {
            out[n++] = *at;
            continue;
        }
        at++;
        if (*at != 'u') {
            const char *found = strchr(plain, *at);
            out[n++] = found && *found ? meant[found - plain] : *at;
            continue;
        }
        point = retort_json_hex4(at + 1, end);
        at += 4;
        if (point >= 0xd800 && point < 0xdc00 && end - at > 6 && at[1] == '\\' && at[2] == 'u') {
            point = 0x10000 + ((point - 0xd800) << 10) + (retort_json_hex4(at + 3, end) - 0xdc00);
            at += 6;
        }
        if (point < 0x80) {
            out[n++] = (char)point;
        } else if (point < 0x800) {
            out[n++] = (char)(0xc0 | point >> 6);
            out[n++] = (char)(0x80 | (point & 63));
        } else if (point < 0x10000) {
            out[n++] = (char)(0xe0 | point >> 12);
            out[n++] = (char)(0x80 | (point >> 6 & 63));
            out[n++] = (char)(0x80 | (point & 63));
        } else {
            out[n++] = (char)(0xf0 | point >> 18);
            out[n++] = (char)(0x80 | (point >> 12 & 63));
            out[n++] = (char)(0x80 | (point >> 6 & 63));
            out[n++] = (char)(0x80 | (point & 63));
        }
    }
    if (n >= size)
        return 0;
    out[n] = 0;
    return 1;
}

#endif /* RETORT_TEXT_H */
