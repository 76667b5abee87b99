/* The Python module: for the stable ABI of Python 3.11 and later. An array is given as an object with a buffer, or as its
 * address; shapes are the caller's to have right, which ../__init__.py sees to. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "mhk.h"

typedef struct {
    Py_buffer view;
    void *at;
    int held;
} array;

static int get(PyObject *object, void *p) { /* a converter of PyArg_ParseTuple */
    array *a = p;
    if (!object) { /* clean up */
        if (a->held) PyBuffer_Release(&a->view);
        a->held = 0;
        return 1;
    }
    if (object == Py_None) return 1;
    if (PyLong_Check(object)) {
        a->at = PyLong_AsVoidPtr(object);
        return a->at || !PyErr_Occurred();
    }
    if (PyObject_GetBuffer(object, &a->view, PyBUF_SIMPLE)) return 0;
    a->held = 1;
    a->at = a->view.buf;
    return Py_CLEANUP_SUPPORTED;
}
static void release(array *arrays, int n) {
    for (int i = 0; i < n; i++) get(0, arrays + i);
}
static PyObject *result(int code) {
    if (!code) Py_RETURN_NONE;
    if (code == MHK_NO_MEMORY) return PyErr_NoMemory();
    if (code == MHK_OUTSIDE) PyErr_SetString(PyExc_IndexError, "an id is outside the table");
    else if (code == MHK_UNHOLDABLE) PyErr_SetString(PyExc_OverflowError, "weights are not finite, or too large");
    else
        PyErr_SetString(PyExc_ValueError, "kernels: the arguments do not fit together, or there are none for this processor");
    return 0;
}

enum { W, S, M, X, Y };

static PyObject *linear(PyObject *module, PyObject *args) {
    array a[5] = {{.at = 0}};
    int kind, threads, openmp, code;
    long rows, n, k;
    (void)module;
    if (!PyArg_ParseTuple(args, "iO&O&O&O&O&lllii", &kind, get, a + W, get, a + S, get, a + M, get, a + X, get, a + Y, &rows,
                          &n, &k, &threads, &openmp))
        return 0;
    const mhk_matrix w = {kind, a[W].at, a[S].at, a[M].at, n, k};
    Py_BEGIN_ALLOW_THREADS
    code = mhk_linear(&w, a[X].at, a[Y].at, rows, threads, openmp);
    Py_END_ALLOW_THREADS
    release(a, 5);
    return result(code);
}
static PyObject *linears(PyObject *module, PyObject *args) {
    array a[4 * MHK_TOGETHER + 1] = {{.at = 0}};
    mhk_matrix w[MHK_TOGETHER];
    float *ys[MHK_TOGETHER];
    PyObject *matrices;
    int threads, openmp, code;
    long rows, k;
    (void)module;
    if (!PyArg_ParseTuple(args, "O!O&llii", &PyTuple_Type, &matrices, get, a + 4 * MHK_TOGETHER, &rows, &k, &threads, &openmp))
        return 0;
    const Py_ssize_t count = PyTuple_Size(matrices);
    for (Py_ssize_t m = 0; m < count && m < MHK_TOGETHER; m++) {
        array *b = a + 4 * m;
        if (!PyArg_ParseTuple(PyTuple_GetItem(matrices, m), "iO&O&O&O&l", &w[m].kind, get, b, get, b + 1, get, b + 2, get, b + 3,
                              &w[m].n)) {
            release(a, 4 * MHK_TOGETHER + 1);
            return 0;
        }
        w[m].codes = b[0].at, w[m].scales = b[1].at, w[m].minima = b[2].at, w[m].k = k;
        ys[m] = b[3].at;
    }
    Py_BEGIN_ALLOW_THREADS
    code = mhk_linears(w, count, a[4 * MHK_TOGETHER].at, ys, rows, threads, openmp);
    Py_END_ALLOW_THREADS
    release(a, 4 * MHK_TOGETHER + 1);
    return result(code);
}
static PyObject *attend(PyObject *module, PyObject *args) {
    array a[5] = {{.at = 0}};
    mhk_shapes s;
    int threads, openmp, code;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&O&lllllllffii", get, a, get, a + 1, get, a + 2, get, a + 3, get, a + 4, &s.batch,
                          &s.heads, &s.kv_heads, &s.time, &s.slots, &s.width, &s.masks, &s.scale, &s.softcap, &threads,
                          &openmp))
        return 0;
    Py_BEGIN_ALLOW_THREADS
    code = mhk_attend(&s, a[0].at, a[1].at, a[2].at, a[3].at, a[4].at, threads, openmp);
    Py_END_ALLOW_THREADS
    release(a, 5);
    return result(code);
}
static PyObject *rotate(PyObject *module, PyObject *args) {
    array a[4] = {{.at = 0}};
    long batch, heads, time, width, tables;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&O&lllll", get, a, get, a + 1, get, a + 2, get, a + 3, &batch, &heads, &time, &width,
                          &tables))
        return 0;
    const int code = mhk_rotate(a[0].at, a[1].at, a[2].at, a[3].at, batch, heads, time, width, tables);
    release(a, 4);
    return result(code);
}
static PyObject *write_slots(PyObject *module, PyObject *args) {
    array a[3] = {{.at = 0}};
    long batch, heads, time, width, slots;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&lllll", get, a, get, a + 1, get, a + 2, &batch, &heads, &time, &width, &slots)) return 0;
    const int code = mhk_write(a[0].at, a[1].at, a[2].at, batch, heads, time, width, slots);
    release(a, 3);
    return result(code);
}
static PyObject *activate(PyObject *module, PyObject *args) {
    array a[2] = {{.at = 0}};
    int kind;
    long n;
    (void)module;
    if (!PyArg_ParseTuple(args, "iO&O&l", &kind, get, a, get, a + 1, &n)) return 0;
    const int code = mhk_activate(kind, a[0].at, a[1].at, n);
    release(a, 2);
    return result(code);
}
static PyObject *widen(PyObject *module, PyObject *args) {
    array a[5] = {{.at = 0}};
    int kind, threads, openmp, code;
    long first, count, n, k;
    (void)module;
    if (!PyArg_ParseTuple(args, "iO&O&O&O&llllii", &kind, get, a + W, get, a + S, get, a + M, get, a + Y, &first, &count, &n,
                          &k, &threads, &openmp))
        return 0;
    const mhk_matrix w = {kind, a[W].at, a[S].at, a[M].at, n, k};
    Py_BEGIN_ALLOW_THREADS
    code = mhk_widen(&w, first, count, a[Y].at, threads, openmp);
    Py_END_ALLOW_THREADS
    release(a, 5);
    return result(code);
}
static PyObject *take(PyObject *module, PyObject *args) {
    array a[5] = {{.at = 0}};
    int kind, code;
    long count, n, k;
    (void)module;
    if (!PyArg_ParseTuple(args, "iO&O&O&O&O&lll", &kind, get, a + W, get, a + S, get, a + M, get, a + X, get, a + Y, &count,
                          &n, &k))
        return 0;
    const mhk_matrix w = {kind, a[W].at, a[S].at, a[M].at, n, k};
    Py_BEGIN_ALLOW_THREADS
    code = mhk_take(&w, a[X].at, count, a[Y].at);
    Py_END_ALLOW_THREADS
    release(a, 5);
    return result(code);
}
static PyObject *rms_norm(PyObject *module, PyObject *args) {
    array a[3] = {{.at = 0}};
    long rows, n;
    float eps, offset;
    (void)module;
    if (!PyArg_ParseTuple(args, "O&O&O&llff", get, a, get, a + 1, get, a + 2, &rows, &n, &eps, &offset)) return 0;
    const int code = mhk_rms_norm(a[0].at, a[1].at, a[2].at, rows, n, eps, offset);
    release(a, 3);
    return result(code);
}
static PyObject *pack(PyObject *module, PyObject *args) {
    array a[5] = {{.at = 0}};
    int kind, code;
    long count, k;
    (void)module;
    if (!PyArg_ParseTuple(args, "iO&llO&O&O&O&", &kind, get, a + X, &count, &k, get, a + Y, get, a + W, get, a + S, get,
                          a + M))
        return 0;
    Py_BEGIN_ALLOW_THREADS
    code = mhk_pack(kind, a[X].at, count, k, a[Y].at, a[W].at, a[S].at, a[M].at);
    Py_END_ALLOW_THREADS
    release(a, 5);
    return result(code);
}
static PyObject *pack_gguf(PyObject *module, PyObject *args) {
    array a[5] = {{.at = 0}};
    int type, code;
    long row_bytes, count, k;
    (void)module;
    if (!PyArg_ParseTuple(args, "iO&lllO&O&O&", &type, get, a + X, &row_bytes, &count, &k, get, a + W, get, a + S, get,
                          a + M))
        return 0;
    Py_BEGIN_ALLOW_THREADS
    code = mhk_pack_gguf(type, a[X].at, row_bytes, count, k, a[W].at, a[S].at, a[M].at);
    Py_END_ALLOW_THREADS
    release(a, 5);
    return result(code);
}
static PyObject *isa(PyObject *module, PyObject *args) {
    const char *name = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "|s", &name)) return 0;
    if (name && mhk_set_isa(name)) Py_RETURN_NONE;
    return PyUnicode_FromString(mhk_isa());
}
static PyObject *set_threads(PyObject *module, PyObject *args) {
    int threads;
    (void)module;
    if (!PyArg_ParseTuple(args, "i", &threads)) return 0;
    mhk_set_threads(threads);
    Py_RETURN_NONE;
}
static PyObject *use_openmp(PyObject *module, PyObject *args) {
    array a = {.at = 0};
    (void)module;
    if (!PyArg_ParseTuple(args, "O&", get, &a)) return 0;
    mhk_use_openmp(a.at);
    Py_RETURN_NONE;
}

extern void mhk_tf_call(void *, const void **, const char *, size_t, void *);
extern void *const mhk_xla_handlers[];
extern const char *const mhk_xla_names[];
extern int mhk_xla_minor;
static PyObject *xla_handlers(PyObject *module, PyObject *args) {
    int minor;
    (void)module;
    if (!PyArg_ParseTuple(args, "i", &minor)) return 0;
    if (minor < mhk_xla_minor) mhk_xla_minor = minor;
    PyObject *found = PyDict_New();
    for (int i = 0; found && mhk_xla_names[i]; i++) {
        PyObject *capsule = PyCapsule_New(mhk_xla_handlers[i], 0, 0);
        int failed = !capsule || PyDict_SetItemString(found, mhk_xla_names[i], capsule);
        Py_XDECREF(capsule);
        if (failed) Py_CLEAR(found);
    }
    return found;
}

static PyMethodDef methods[] = {
    {"linear", linear, METH_VARARGS, "linear(kind, codes, scales, minima, x, y, rows, n, k, threads, openmp)"},
    {"linears", linears, METH_VARARGS, "linears(((kind, codes, scales, minima, y, n), ...), x, rows, k, threads, openmp)"},
    {"attend", attend, METH_VARARGS,
     "attend(q, k, v, mask, y, batch, heads, kv_heads, time, slots, width, masks, scale, softcap, threads, openmp)"},
    {"rotate", rotate, METH_VARARGS, "rotate(x, cosines, sines, y, batch, heads, time, width, tables)"},
    {"write", write_slots, METH_VARARGS, "write(buffer, rows, start, batch, heads, time, width, slots)"},
    {"activate", activate, METH_VARARGS, "activate(kind, x, y, n)"},
    {"widen", widen, METH_VARARGS, "widen(kind, codes, scales, minima, out, first, count, n, k, threads, openmp)"},
    {"take", take, METH_VARARGS, "take(kind, codes, scales, minima, ids, out, count, n, k)"},
    {"rms_norm", rms_norm, METH_VARARGS, "rms_norm(x, weight, y, rows, n, eps, offset)"},
    {"pack", pack, METH_VARARGS, "pack(kind, rows, count, k, importance, codes, scales, minima): one tile"},
    {"pack_gguf", pack_gguf, METH_VARARGS, "pack_gguf(type, rows, row_bytes, count, k, codes, scales, minima): one tile"},
    {"isa", isa, METH_VARARGS, "isa(): the instruction set in use; isa(name): use it, None if it is not there"},
    {"set_threads", set_threads, METH_VARARGS, "set_threads(n): what XLA and TensorFlow use"},
    {"use_openmp", use_openmp, METH_VARARGS, "use_openmp(address of GOMP_parallel)"},
    {"xla_handlers", xla_handlers, METH_VARARGS, "xla_handlers(minor version of its FFI): {name: capsule}, XLA's"},
    {0},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", 0, -1, methods, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__kernels(void) {
    PyObject *module = PyModule_Create(&definition);
    PyObject *call = module ? PyLong_FromVoidPtr((void *)mhk_tf_call) : 0;
    if (!call || PyModule_AddObjectRef(module, "TF_CALL", call) || PyModule_AddIntConstant(module, "ABI", MHK_ABI))
        Py_CLEAR(module);
    Py_XDECREF(call);
    return module;
}
