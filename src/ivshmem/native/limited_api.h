/* Given to the compiler before a module's C file (-include), for modules that one build makes for
   CPython 3.10 and all newer ones ("abi3"). setup.py does so; `cython` knows nothing of it.

   Cython takes the functions of CPython 3.10 alone. That version's limited API lacks the buffer
   protocol and fast calls, and the interpreter has both: a module that uses them loads there, and
   they have stood in the limited API since 3.11 and 3.12. test_limited_api.py
   runs the modules on it, and compares the functions that they take with those that it has. */
#ifndef IVSHMEM_LIMITED_API
#define IVSHMEM_LIMITED_API

#define Py_LIMITED_API 0x030B0000 /* declares the buffer protocol */
#include <Python.h>
#include <string.h>
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000 /* what Cython reads */

typedef PyObject *(*vectorcallfunc)(PyObject *, PyObject *const *, size_t, PyObject *);
#undef PY_VECTORCALL_ARGUMENTS_OFFSET
#define PY_VECTORCALL_ARGUMENTS_OFFSET ((size_t)1 << (8 * sizeof(size_t) - 1))
#undef Py_TPFLAGS_HAVE_VECTORCALL
#define Py_TPFLAGS_HAVE_VECTORCALL (1UL << 11)
#undef PyVectorcall_NARGS
#define PyVectorcall_NARGS(n) ((Py_ssize_t)((n) & ~PY_VECTORCALL_ARGUMENTS_OFFSET))
PyObject *PyVectorcall_Call(PyObject *, PyObject *, PyObject *);
PyObject *PyObject_VectorcallDict(PyObject *, PyObject *const *, size_t, PyObject *);
PyObject *PyObject_VectorcallMethod(PyObject *, PyObject *const *, size_t, PyObject *);

/* Without it no __del__ is ever called, and that is what gives back a message whose view was
   forgotten. */
#define CYTHON_USE_TP_FINALIZE 1
int PyObject_CallFinalizerFromDealloc(PyObject *);

/* Cython asks the module inspect for those of these that are missing, and imports it in any case:
   that takes half the time that a command takes to start. Nothing reads what stands in its place. */
#define CO_OPTIMIZED 0x1
#define CO_NEWLOCALS 0x2
#define CO_VARARGS 0x4
#define CO_VARKEYWORDS 0x8
#define CO_GENERATOR 0x20
#define CO_COROUTINE 0x80
#define CO_ASYNC_GENERATOR 0x200
static inline PyObject *ivshmem_import(const char *name)
{
    if (strcmp(name, "inspect") == 0) {
        Py_INCREF(Py_None);
        return Py_None;
    }
    return PyImport_ImportModule(name);
}
#define PyImport_ImportModule ivshmem_import

/* In 3.10 it is not a symbol. */
static inline PyObject *ivshmem_vectorcall(PyObject *called, PyObject *const *arguments,
                                           size_t count, PyObject *names)
{
    if (names == NULL)
        return PyObject_VectorcallDict(called, arguments, count, NULL);
    Py_ssize_t given = PyVectorcall_NARGS(count), named = PyTuple_Size(names);
    PyObject *tuple = PyTuple_New(given), *dict = PyDict_New(), *result = NULL;
    if (tuple != NULL && dict != NULL) {
        for (Py_ssize_t i = 0; i < given; i++) {
            Py_INCREF(arguments[i]);
            PyTuple_SetItem(tuple, i, arguments[i]);
        }
        Py_ssize_t i = 0;
        while (i < named
               && PyDict_SetItem(dict, PyTuple_GetItem(names, i), arguments[given + i]) == 0)
            i++;
        if (i == named)
            result = PyObject_Call(called, tuple, dict);
    }
    Py_XDECREF(tuple);
    Py_XDECREF(dict);
    return result;
}
#define PyObject_Vectorcall ivshmem_vectorcall

/* Cython leaves it out where there are fast calls, and uses it all the same. 0: a bound method. */
static inline int __Pyx_PyObject_GetMethod(PyObject *object, PyObject *name, PyObject **method)
{
    *method = PyObject_GetAttr(object, name);
    return 0;
}

#endif
