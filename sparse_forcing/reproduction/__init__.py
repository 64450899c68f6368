"""The paper in miniature: trainings, students, claims, tables and plots"""
